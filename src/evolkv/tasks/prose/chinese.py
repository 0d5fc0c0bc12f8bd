"""The Chinese grammar: a measure word between determiner and noun, adverbials before the verb."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from evolkv.tasks.prose.words import phrases

_PEOPLE = """
    面包师|木匠|教师|船夫|邮递员|医生|牧羊人|裁缝|店主|渔夫|画家|磨坊主|律师|护士|养蜂人|铁匠|列车员|厨师|牙医|农夫
    杂货商|法官|技工|镇长|矿工|音乐家|药剂师|摄影师|飞行员|水管工|印刷工|水手|雕塑家|鞋匠|大学生|测量员|服务员
    钟表匠|织布工|书商|大提琴手|化学家|车夫|骑手|金匠|历史学家|记者|搬运工|翻译|园丁|理发师|守门人|接生婆|演员
"""
_PERSON_QUALITIES = """
    年老|年轻|快活|疲惫|固执|有耐心|谨慎|健忘|刚退休|慷慨|有名|害羞|聪明|有礼貌|孤独|温和|容易紧张|健谈
    爱沉思|坐立不安|善良|骄傲|细心|勤劳|沉默寡言|热心|朴实|风趣
"""
# Each noun after its measure word.
_THINGS = """
    辆 自行车|把 梯子|把 茶壶|只 闹钟|只 手提箱|辆 手推车|张 地图|把 雨伞|架 钢琴|条 小船|只 木箱|副 马鞍
    个 摇篮|架 望远镜|台 打字机|把 水壶|张 渔网|件 大衣|本 日记|把 小提琴|扇 木门|台 缝纫机|个 相框|辆 马车
    封 信|只 鸟笼|个 书架|面 镜子|只 木桶|块 地毯|双 靴子|条 毯子|个 烛台|副 象棋|个 指南针|本 词典|个 门铃
    面 鼓|个 地球仪|把 锤子|只 水罐|盏 油灯|本 相册|根 绳子|个 火炉|块 桌布|支 小号|个 衣柜|扇 窗户|把 椅子
    张 书桌|顶 帽子|副 眼镜|支 钢笔|幅 油画|把 剪刀|条 围巾|口 锅|只 花瓶|台 收音机|把 吉他
"""
_THING_QUALITIES = """
    沉重|破旧|从邻居那儿借来|落满灰尘|漂亮|不太起眼|小巧|特别大|做工精细|便宜|被人遗忘|擦得发亮|昂贵
    略有破损|古老|手工制作|普通|奇特|褪了色|结实|湿漉漉|备用|心爱|别致|崭新|很少使用
"""
_PLACES = """
    座 磨坊|家 面包店|座 图书馆|个 市场|座 火车站|座 市政厅|个 操场|家 邮局|家 医院|片 墓地|个 鱼市|座 剧院
    间 牛棚|座 石桥|座 法院|座 船屋|个 渡口|个 公交车站|座 博物馆|片 菜园|片 海滩|座 城堡|座 谷仓|个 院子
    家 奶牛场|座 消防站|座 温室|家 旅馆|家 客栈|间 厨房|家 洗衣店|座 修道院|座 公园|片 松林|个 采石场
    间 阅览室|家 锯木厂|间 马厩|个 游泳池|家 酒馆|家 茶馆|座 钟楼|片 葡萄园|个 广场|座 仓库|座 水塔|间 作坊
    座 教堂|家 工厂|所 学校|家 书店|座 花园|座 凉亭|家 药店|个 池塘
"""
_PLACE_QUALITIES = """
    安静|拥挤|空荡荡|不大|阳光明媚|废弃已久|热闹|偏远|新建|阴凉|小小|无人照管|熟悉|寒冷|宁静|嘈杂|冷清
    整洁|古老|偏僻|远近闻名|不为人知
"""
# In these, {} stands for a noun phrase; 把 wants a definite one.
_TO_THINGS = """
    修好了{}|画下了{}|卖掉了{}|买下了{}|量了量{}|擦干净了{}|藏起了{}|检查了{}|收好了{}|欣赏了{}|称了称{}
    修补了{}|修整了{}|擦亮了{}|借出了{}|送出了{}|描述了{}|拍下了{}|找到了{}|拖走了{}|带回了{}|搬走了{}|挑选了{}
    收藏了{}|丢掉了{}|包好了{}|抬走了{}|端详了{}|借走了{}|把{}搬进了屋里|把{}送给了亲戚
    把{}放回了原处|把{}拆了开来
"""
_TO_PLACES = """
    路过了{}|参观了{}|想起了{}|赶到了{}|打扫了{}|绕过了{}|回到了{}|画下了{}|来到了{}|离开了{}|找到了{}|走近了{}
    描述了{}|拍下了{}|在{}旁边休息了一会儿|在{}附近散了步|在{}后面睡着了|在{}前面唱了一首歌
    在{}旁边等了很久|在{}附近工作了一整天|朝{}走去|提起了{}|打听了{}的来历|在{}前面停了下来
"""
_TO_PEOPLE = """
    感谢了{}|等了{}很久|和{}争论了一番|向{}挥了挥手|给{}写了一封信|邀请了{}|和{}一起笑了起来|跟上了{}|认出了{}
    帮助了{}|教了{}不少东西|取笑了{}|听{}讲了一个故事|向{}道了歉|和{}吵了一架|和{}结了婚|在{}身旁坐了下来
    让{}大吃一惊|问候了{}|和{}一起出了趟门|和{}打了一会儿牌|为{}做了一顿饭|拜访了{}|安慰了{}|送{}回了家
    给{}打了个电话|向{}告了别|打听了{}的消息|陪{}走了一段路|朝{}笑了笑
"""
_OPENERS = """
    早上|那个星期晚些时候|多年以后|毫无预兆地|像往常一样|星期二那天|中午|一天傍晚|早饭以前|暴风雨过后|放假期间
    起初|最后|有一年秋天|出乎我们意料的是|快到半夜的时候|又一次|过了一会儿|回家的路上|同一年冬天|碰巧|不久以后
    一个下雨的午后|第二年春天|很久以前|临近黄昏|初夏的一天|赶集那天|第二天|一个星期天|那一年|天刚亮|午饭以后
"""
_MANNERS = """
    不慌不忙地|小心翼翼地|微笑着|默默地|悄悄地|毫无缘由地|带着几分遗憾|急匆匆地|好奇地|耐心地|冒着寒风
    当着众人的面|按照约定|应邻居的请求|再一次|高高兴兴地|不情愿地|及时|按照老规矩|在灰蒙蒙的天空下
    在孩子们的注视下|利用午休时间|借着灯光|毫不犹豫地|闲聊了几句之后|出于好奇|破例|难得地
"""
_CLOSERS = """
    谁也没有注意到|大家都笑了|远处正响着钟声|虽然时间已经不早了|那时灯刚刚点亮|客人们还没有到
    太阳正好下山|锅里的汤还在煮着|其他人都还睡着|谁都来不及反对|风也渐渐停了|孩子们在一旁看着
    地上的雪已经化了|这件事后来常被人提起|外面天色阴沉|那天正好是月底|当时街上没有别人|屋里的钟敲了几下
    炉子上的水刚好烧开|隔壁传来了琴声
"""
_PERSON_CLOSERS = """
    什么也没说|那时雨还没有下|然后就回家了|心里有些遗憾|因为没有别的事可做|因为火车晚点了|之后心情好了许多|连时间都忘了
    脸上带着笑容|前前后后花了不少工夫|只是为了打发时间|算是了却了一桩心事|说是早就答应过的|没有告诉任何人
    后来又觉得有些可笑
"""
_WEATHER = """
    暖风吹过了{}|冷风吹过了{}|雨水打湿了{}|大雪盖住了{}|大雾笼罩了{}|薄薄的雾气飘过了{}|炊烟飘到了{}
    新鲜面包的香味飘到了{}|干草的气味飘到了{}|教堂的钟声传到了{}|远处的歌声传遍了{}|街上的喧闹声传到了{}
    清晨的阳光照亮了{}|傍晚的霞光洒满了{}|一阵花香飘过了{}|琴声在{}四周回荡|云朵从{}上空飘过|月光洒满了{}
    小雨落在了{}四周|雷雨过后的凉意笼罩了{}
"""


@dataclass(frozen=True)
class Counted:
    """A noun and its measure word."""

    measure: str
    noun: str


def _counted(block: str) -> tuple[Counted, ...]:
    return tuple(Counted(*entry.split()) for entry in phrases(block))


PEOPLE = tuple(Counted("位", noun) for noun in phrases(_PEOPLE))
THINGS, PLACES = _counted(_THINGS), _counted(_PLACES)
PERSON_QUALITIES, THING_QUALITIES = phrases(_PERSON_QUALITIES), phrases(_THING_QUALITIES)
PLACE_QUALITIES = phrases(_PLACE_QUALITIES)
TO_PEOPLE, TO_THINGS, TO_PLACES = phrases(_TO_PEOPLE), phrases(_TO_THINGS), phrases(_TO_PLACES)
OPENERS, MANNERS, CLOSERS = phrases(_OPENERS), phrases(_MANNERS), phrases(_CLOSERS)
PERSON_CLOSERS, WEATHER = CLOSERS + phrases(_PERSON_CLOSERS), phrases(_WEATHER)


def sentence(rng: random.Random) -> str:
    """Return one sentence, drawn with `rng`."""
    kind = rng.random()
    if kind < 0.08:
        text, closers = rng.choice(WEATHER).format(_place(rng)), CLOSERS
    else:
        closers = PERSON_CLOSERS
        agent, other = rng.sample(PEOPLE, 2)
        text = _noun(
            rng, rng.choice(("那", "一", "镇上那", "村里的一", "隔壁那", "我认识的一")), agent, PERSON_QUALITIES
        )
        if rng.random() < 0.35:
            text += rng.choice(MANNERS)
        if kind < 0.45:
            pattern = rng.choice(TO_THINGS)
            determiner = "那" if pattern.startswith("把") else rng.choice(("那", "一"))
            text += pattern.format(_noun(rng, determiner, rng.choice(THINGS), THING_QUALITIES))
        elif kind < 0.75:
            text += rng.choice(TO_PLACES).format(_place(rng))
        else:
            determiner = rng.choice(("那", "一", "镇上那"))
            text += rng.choice(TO_PEOPLE).format(_noun(rng, determiner, other, PERSON_QUALITIES))
    shape = rng.random()
    if shape < 0.35:
        text = f"{rng.choice(OPENERS)}，{text}"
    if shape > 0.25:
        text = f"{text}，{rng.choice(closers)}"
    return f"{text}。"


def _place(rng: random.Random) -> str:
    return _noun(rng, rng.choice(("那", "镇上那", "附近那")), rng.choice(PLACES), PLACE_QUALITIES)


def _noun(rng: random.Random, determiner: str, noun: Counted, qualities: Sequence[str]) -> str:
    quality = f"{rng.choice(qualities)}的" if rng.random() < 0.6 else ""
    return f"{determiner}{noun.measure}{quality}{noun.noun}"
